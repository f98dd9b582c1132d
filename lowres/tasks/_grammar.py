"""Minimal pairs for `grammaticality`: one function a phenomenon, listed in KNOWN and HELD_OUT.

Wherever it can be done, a phenomenon also has the mirrored pair (what is wrong here is right in
another context), so that neither a word nor the length tells the label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lowres.tasks._phrases import Draw, Slot, contrast

NEAR = ("near", "behind", "beside")
MOMENTS = ("yesterday", "last night", "last week", "this morning", "on Sunday")
# None of these can be read as an object ("she described last night" would be right).
CLOSINGS = ("after dinner", "before breakfast", "again", "at last", "in silence", "at noon")
CASES = (("he", "him"), ("she", "her"), ("they", "them"), ("we", "us"), ("I", "me"))


def subject_verb_agreement(d: Draw) -> tuple[str, str]:
    """The farmer walks / walk to the village."""
    plural = d.coin()
    verb, rest = d.agreeing(plural)
    # No names: "Sarah drop the parcels" lacks only a comma to be an order.
    return contrast(d.someone(plural), verb, rest)


def attractor_agreement(d: Draw) -> tuple[str, str]:
    """The farmer near the carts walks / walk; the other noun mostly has the other number."""
    plural = d.coin()
    other = plural if d.rng.random() < 0.3 else not plural
    near = d.one(NEAR)
    if d.coin():
        be = d.swap(*d.one((("is", "are"), ("was", "were"))), plural)
        behind = d.phrase(d.one(d.words.places), other) if d.coin() else d.something(other)
        return contrast(d.something(plural), near, behind, be, "very", d.one(d.words.of_things))
    verb, rest = d.agreeing(plural)
    attractor = d.someone(other) if d.coin() else d.phrase(d.one(d.words.places), other)
    return contrast(d.someone(plural), near, attractor, verb, rest)


def relative_clause_agreement(d: Draw) -> tuple[str, str]:
    """The farmer who met the soldiers is / are tired."""
    plural = d.coin()
    other = d.someone(plural if d.rng.random() < 0.3 else not plural)
    past = d.one(d.words.people_verbs).past
    clause = f"who {past} {other}" if d.coin() else f"whom {other} {past}"
    verb, rest = d.agreeing(plural)
    return contrast(d.someone(plural), clause, verb, rest)


def determiner_noun_agreement(d: Draw) -> tuple[str, str]:
    """This basket / baskets, and this / these basket."""
    plural = d.coin()
    one, many = ("this", "that", "every", "another"), ("these", "those", "several", "two", "many")
    right, wrong = d.swap(d.one(one), d.one(many), plural)
    thing = d.one(d.words.things)
    noun: Slot = thing.form(plural)
    determiner: Slot = right
    if d.coin():
        determiner = (right, wrong)
    else:
        noun = (thing.form(plural), thing.form(not plural))
    adjective = d.one(d.words.of_things) if d.rng.random() < 0.3 else ""
    end = d.one((d.place(), d.one(MOMENTS)))
    return contrast(d.subject(), d.deed().past, determiner, adjective, noun, end)


def reflexive_gender(d: Draw) -> tuple[str, str]:
    """The queen praised herself / himself."""
    woman = d.coin()
    nouns = d.words.women if woman else d.words.men
    names = d.words.female_names if woman else d.words.male_names
    subject = d.one(names) if d.coin() else d.phrase(d.one(nouns), False, (d.quality(),))
    reflexive = d.swap("himself", "herself", woman)
    return contrast(subject, d.one(d.words.reflexive).past, reflexive, d.one(CLOSINGS))


def reflexive_number(d: Draw) -> tuple[str, str]:
    """The queens praised themselves / herself; of gendered nouns, as "they" may be singular."""
    woman, plural = d.coin(), d.coin()
    noun = d.one(d.words.women if woman else d.words.men)
    reflexive = d.swap("herself" if woman else "himself", "themselves", plural)
    subject = d.phrase(noun, plural, (d.quality(),))
    return contrast(subject, d.one(d.words.reflexive).past, reflexive, d.one(CLOSINGS))


def auxiliary_form(d: Draw) -> tuple[str, str]:
    """Has carried / carry, must carry / carrying, is carrying / carry the basket."""
    # "Have" with a gerund and "be" with a participle are left out to keep right and wrong uses of
    # each form equally frequent.
    right, wrong = d.one(
        (("base", "participle"), ("participle", "base"), ("base", "gerund"), ("gerund", "base"))
    )
    verb, plural = d.deed(), d.coin()
    forms = (getattr(verb, right), getattr(verb, wrong))
    rest = (d.something(), d.place() if d.coin() else "")
    return contrast(d.subject(plural), d.auxiliary(right, plural), forms, *rest)


def irregular_form(d: Draw) -> tuple[str, str]:
    """She wrote / written a letter, she has written / wrote a letter."""
    verb = d.one(d.words.irregular)
    perfect, plural = d.coin(), d.coin()
    has = ("had" if d.coin() else "have" if plural else "has") if perfect else ""
    forms = d.swap(verb.past, verb.participle, perfect)
    return contrast(d.subject(plural), has, forms, d.one(verb.tails))


def negation(d: Draw) -> tuple[str, str]:
    """Did not carry / carried, has not carried / carry; does not, and never without it."""
    plural, verb, rest = d.coin(), d.deed(), (d.something(), d.place() if d.coin() else "")
    kind = d.rng.randrange(6)
    # No names with "do not" and bare "never": a comma away from an order.
    subject = d.someone(plural) if kind in (2, 3) else d.subject(plural)
    if kind == 0:
        return contrast(subject, "did not", (verb.base, verb.past), *rest)
    if kind == 1:
        has = "have" if plural else "has"
        return contrast(subject, has, "not", (verb.participle, verb.base), *rest)
    if kind == 2:
        return contrast(subject, d.swap("does", "do", plural), "not", verb.base, *rest)
    if kind == 3:
        return contrast(subject, "never", d.swap(verb.third, verb.base, plural), *rest)
    if kind == 4:
        return contrast("did", subject, (verb.base, verb.past), *rest, end="?")
    # Not "have": "have the boys fetch a box" is an order.
    return contrast("has", d.subject(), (verb.participle, verb.base), *rest, end="?")


def word_order(d: Draw) -> tuple[str, str]:
    """The old farmer / the farmer old, carried the basket / the basket carried."""
    kind = d.rng.randrange(6)
    person, verb, thing, place = d.person().singular, d.deed(), d.one(d.words.things), d.place()
    quality = d.quality()
    if kind == 0:
        phrase = (f"{quality} {person}", f"{person} {quality}")
        return contrast("the", phrase, verb.past, d.something(), place)
    if kind == 1:
        carried, basket = verb.past, d.something()
        return contrast(d.subject(), (f"{carried} {basket}", f"{basket} {carried}"), place)
    if kind == 2:
        noun, the = thing.singular, d.one(("the", "my", "your", "our"))
        return contrast(d.subject(), verb.past, (f"{the} {noun}", f"{noun} {the}"), place)
    if kind == 3:
        preposition, _, where = place.partition(" ")
        slept = d.one(d.words.intransitive).past
        order = (f"{preposition} {where}", f"{where} {preposition}")
        return contrast(d.subject(), slept, order, d.one(CLOSINGS))
    if kind == 4:
        form = d.one(("base", "participle", "gerund"))
        has, carried = d.auxiliary(form), getattr(verb, form)
        order = (f"{has} {carried}", f"{carried} {has}")
        return contrast(d.subject(), order, d.something(), place)
    be = d.one(("is", "was"))
    return contrast(d.subject(), (f"{be} very", f"very {be}"), quality)


def negative_polarity(d: Draw) -> tuple[str, str]:
    """No / every farmer has ever carried it; not every / not no farmer has."""
    carried, basket = d.deed().participle, d.something()
    first, second = (person.singular for person in d.couple())
    kind = d.rng.randrange(4)
    no, every = d.one((("nobody", "everybody"), (f"no {first}", f"every {first}")))
    if kind == 0:
        # Inside a clause: a capitalised "No" would occur in right sentences only.
        return contrast(d.name(), "says that", (no, every), "has ever", carried, basket)
    if kind == 1:
        return contrast("not", (every, no), "has", carried, basket, d.place())
    if kind == 2:
        # The negation has to stand above "any", not inside the relative clause.
        rested, baskets = d.one(d.words.intransitive).participle, d.one(d.words.things).plural
        order = (f"has {rested} has not", f"has not {rested} has")
        return contrast("the", first, "who", order, carried, "any", baskets)
    met = d.one(d.words.people_verbs).past
    order = (f"no {first} who {met} the {second}", f"the {first} who {met} no {second}")
    return contrast(d.name(), "says", order, "has ever", carried, basket)


def pronoun_case(d: Draw) -> tuple[str, str]:
    """Yesterday she / her carried the basket; the farmer greeted her / she."""
    # Never first in the sentence: a capitalised "Him" would occur in wrong sentences only.
    nominative, accusative = d.one(CASES)
    subject, object_ = (nominative, accusative), (accusative, nominative)
    kind = d.rng.randrange(4)
    if kind == 0:
        return contrast(d.one(MOMENTS), subject, d.deed().past, d.something(), d.place())
    if kind == 1:
        had = f"had {d.deed().participle}"
        return contrast(d.subject(), "said that", subject, had, d.something())
    if kind == 2:
        met = d.one(d.words.people_verbs).past
        return contrast(d.subject(), met, object_, d.one((d.place(), d.one(MOMENTS))))
    act = d.one(d.words.intransitive + d.words.activities).past
    return contrast(d.subject(), act, d.one(NEAR), object_, d.one((d.place(), d.one(MOMENTS))))


def question_inversion(d: Draw) -> tuple[str, str]:
    """Why has she gone / why she has gone? He knows why she has gone / has she gone."""
    subject, verb, direct = d.subject(), d.deed(), d.coin()
    known, tense = d.one((("knows", ("will", "should")), ("knew", ("would", "should"))))
    question, auxiliary = d.one(("why", "where", "when", "how", "what")), d.one(tense)
    rest = f"{verb.base} {d.place() if question == 'what' else d.something()}"
    if d.coin():
        question, auxiliary = "why", "has" if known == "knows" else "had"
        rest = f"{verb.participle} {d.something()}"
    elif direct and d.coin():
        auxiliary = "did"
    inverted, plain = f"{auxiliary} {subject}", f"{subject} {auxiliary}"
    if direct:
        return contrast(question, (inverted, plain), rest, end="?")
    return contrast(d.name(), known, question, (plain, inverted), rest)


def comparison(d: Draw) -> tuple[str, str]:
    """Taller / tall than, as tall / taller as, more careful than / as, much / more braver."""
    be, (first, second) = d.one(("is", "was")), d.couple()
    subject = d.name() if d.coin() else d.phrase(first, False, (d.quality(),))
    adjective, comparative = d.one(d.words.short)
    careful, kind = d.one(d.words.long), d.rng.randrange(6)
    middle: tuple[Slot, ...] = {
        0: ((comparative, adjective), "than"),
        1: ("as", (adjective, comparative), "as"),
        2: (("more", "as"), careful, "than"),
        3: (("as", "more"), careful, "as"),
        4: (("much", "more"), comparative, "than"),
        5: (("more", "much"), careful, "than"),
    }[kind]
    return contrast(subject, be, *middle, d.phrase(second, d.coin(), (d.quality(),)))


def transitivity(d: Draw) -> tuple[str, str]:
    """He carried / arrived the basket; he arrived / carried at noon."""
    carried, arrived = d.one(d.words.strict).past, d.one(d.words.intransitive).past
    # A name, as "the lady admired at noon" can be a noun with a reduced relative clause.
    if d.coin():
        return contrast(d.name(), (carried, arrived), d.something(), d.one(CLOSINGS))
    return contrast(d.name(), (arrived, carried), d.place(), d.one(CLOSINGS))


def existential_agreement(d: Draw) -> tuple[str, str]:
    """There is / are a basket in the kitchen."""
    plural = d.coin()
    be = d.swap(*d.one((("is", "are"), ("was", "were"))), plural)
    determiner = d.one(("two", "three", "several", "many") if plural else ("one", "another"))
    thing = d.one(d.words.things).form(plural)
    return contrast("there", be, determiner, d.one(d.words.of_things), thing, d.place())


def passive_voice(d: Draw) -> tuple[str, str]:
    """The basket was carried / carrying by the maid; the maid was carrying / carried it."""
    verb, active, plural = d.one(d.words.strict), d.coin(), d.coin()
    be = "were" if plural else "was"
    forms = d.swap(verb.participle, verb.gerund, active)
    if active:
        subject = d.subject(plural)
        return contrast(subject, be, forms, d.something(), d.place())
    return contrast(d.something(plural), be, forms, "by", d.subject(), d.place())


def mass_and_count(d: Draw) -> tuple[str, str]:
    """Too much / many milk, too many / much baskets."""
    countable = d.coin()
    noun = d.one(d.words.things).plural if countable else d.one(d.words.mass)
    amount = d.swap("much", "many", countable)
    if d.coin():
        return contrast(
            "how", amount, noun, "did", d.subject(), d.one(d.words.strict).base, end="?"
        )
    past = d.one(d.words.strict).past
    return contrast(d.subject(), past, d.one(("too", "so")), amount, noun, d.place())


def gerund_and_infinitive(d: Draw) -> tuple[str, str]:
    """She enjoyed carrying / to carry it, she hoped to carry / carrying it."""
    verb, infinitive = d.one(d.words.strict), d.coin()
    hoped = ("hoped", "refused", "decided", "promised", "managed", "pretended")
    enjoyed = ("enjoyed", "avoided", "denied", "risked")
    forms = d.swap(verb.gerund, f"to {verb.base}", infinitive)
    return contrast(d.subject(), d.one(hoped if infinitive else enjoyed), forms, d.something())


Phenomena = Mapping[str, Callable[[Draw], tuple[str, str]]]

_REFERENCE = (reflexive_gender, reflexive_number, pronoun_case)
_ORDER = (word_order, question_inversion, negative_polarity, comparison, transitivity)
_AGREEMENT = (subject_verb_agreement, attractor_agreement, relative_clause_agreement)
_MORE_AGREEMENT = (determiner_noun_agreement, existential_agreement)
_FORMS = (auxiliary_form, irregular_form, negation, passive_voice)
_CHOICES = (mass_and_count, gerund_and_infinitive)

KNOWN: Phenomena = {f.__name__: f for f in _REFERENCE + _ORDER}
"""Phenomena of all splits."""

HELD_OUT: Phenomena = {f.__name__: f for f in _AGREEMENT + _MORE_AGREEMENT + _FORMS + _CHOICES}
"""Phenomena of the out-of-domain split only."""
