"""The words of `grammaticality`, in two tables that share no word: KNOWN and HELD_OUT.

A table holds a class of words as one string. Forms are divided by `/`; those that follow the
regular rule are left out: `child/children`, `take/took/taken`, `sit/sat/sat/sitting`, `sad/sadder`.
A word is in a class only if every sentence of `_grammar` that draws from it comes out right:

    strict, people_verbs    cannot do without an object ("she fetched at noon" must be wrong)
    intransitive            cannot take one ("she arrived the lamp" must be wrong)
    every verb              has no past that is another verb's base ("did not found", "did not saw")
                            and cannot be read with two objects after "was"
    men, women, names       can be one gender only
    things                  countable, with a plural that differs from the singular
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

KNOWN: Mapping[str, str] = {
    "men": """king uncle father brother son husband grandfather nephew prince duke boy monk man/men
        gentleman/gentlemen footman/footmen""",
    "women": """queen aunt mother sister daughter wife/wives lady grandmother niece princess girl
        maid nun duchess woman/women""",
    "people": """farmer doctor captain soldier sailor servant teacher child/children neighbour
        stranger traveller lawyer priest merchant beggar prisoner clerk thief/thieves baker
        gardener shepherd poet painter bishop miller scholar musician friend cousin officer
        physician knight hunter student visitor tailor carpenter banker governor""",
    "things": """basket letter book candle ring box key knife/knives lamp chair picture clock coat
        hat glove bottle cup purse sword pistol umbrella mirror drum flute violin blanket bag bell
        map pipe shoe kettle spoon brush ladder axe barrel cake scarf/scarves dress flag ribbon pen
        diamond jewel coin loaf/loaves trunk cloak parcel newspaper needle plate table carpet
        bonnet""",
    "places": """in:garden near:river in:kitchen in:village in:church in:forest on:hill in:house
        on:road in:street near:town in:market in:field near:lake on:bridge in:castle in:cottage
        in:library in:hall in:park in:meadow near:mill in:palace in:school near:gate in:valley
        on:shore in:tavern near:harbour in:barn""",
    "male_names": """John William George Henry Thomas Charles Edward Robert James Arthur Richard
        Frederick Walter Philip Albert Peter Samuel Edmund Hugh Ralph Daniel Stephen Simon
        Oliver""",
    "female_names": """Mary Anne Jane Elizabeth Emma Margaret Alice Catherine Helen Emily Charlotte
        Sarah Lucy Fanny Dorothy Agnes Clara Eleanor Harriet Ellen Martha Julia Isabel Maria""",
    "strict": """bring/brought describe fetch carry discover seize mention raise rescue restore
        mislay/mislaid grasp""",
    "transitive": """buy/bought sell/sold hide/hid/hidden steal/stole/stolen drop/dropped
        lose/lost hold/held choose/chose/chosen borrow clean pack throw/threw/thrown paint mend
        touch wash send/sent weigh lift collect count watch admire examine obtain receive guard""",
    "people_verbs": """greet thank follow help visit praise blame invite meet/met trust
        teach/taught recognise punish comfort join rescue obey deceive protect surprise annoy
        frighten warn love""",
    "reflexive": """blame praise defend wash dress admire introduce excuse deceive amuse warm save
        pity comfort protect""",
    "intransitive": """arrive sleep/slept laugh weep/wept smile tremble kneel/knelt disappear
        listen linger faint depart""",
    "activities": """walk wait dance work play talk sing/sang/sung pray live sit/sat/sat/sitting
        stand/stood rest cry whistle wander""",
    "irregular": """write/wrote/written=a_long_letter|several_letters|a_short_story
        break/broke/broken=the_glass|the_old_window|a_wooden_chair
        choose/chose/chosen=a_new_horse|the_best_seat|the_wrong_road
        steal/stole/stolen=the_money|the_silver_ring|a_horse
        take/took/taken=the_wrong_road|a_long_walk|the_money
        know/knew/known=the_whole_story|the_truth|the_way_to_the_river
        see/saw/seen=a_white_ship|the_king|a_light_in_the_forest
        eat/ate/eaten=an_apple|all_the_bread|a_good_dinner
        drive/drove/driven=the_carriage|the_horses_to_the_village
        speak/spoke/spoken=to_the_king|to_the_crowd|about_the_war
        sing/sang/sung=an_old_song|a_song_about_the_sea
        begin/began/begun/beginning=a_new_story|a_long_letter|the_work
        throw/threw/thrown=a_stone_into_the_water|the_letter_into_the_fire
        draw/drew/drawn=a_small_picture|a_map_of_the_village
        fall/fell/fallen=into_the_water|from_the_bridge|down_the_stairs
        go/went/gone=to_the_village|into_the_garden|to_the_market
        do/did/done=the_work|a_great_wrong|the_work_again
        rise/rose/risen=from_the_chair|from_the_table|very_early
        give/gave/given=the_money_to_the_poor|a_book_to_the_child""",
    "short": """tall old young brave kind rich poor strong weak proud wise clever happy gentle
        lonely bold calm noble sad/sadder thin/thinner angry quiet""",
    "long": """careful beautiful patient generous famous cheerful curious dangerous faithful
        foolish modest nervous obedient intelligent serious stubborn powerful anxious cautious
        graceful ambitious loyal""",
    "of_things": """heavy small large dirty new old red black white strange plain blue green pretty
        ugly expensive beautiful""",
    "mass": "",
}

HELD_OUT: Mapping[str, str] = {
    "men": "baron bridegroom fisherman/fishermen nobleman/noblemen widower wizard",
    "women": "countess widow bride landlady actress empress",
    "people": """butcher blacksmith weaver pupil orphan guest pirate dancer magistrate messenger
        surgeon peasant cobbler tenant pilgrim porter astronomer architect""",
    "things": """lantern bucket necklace teapot hammer pillow bracelet handkerchief shelf/shelves
        dagger guitar apron saddle telescope portrait goblet jug vase bowl doll cushion chest
        trumpet""",
    "places": """in:orchard in:stable in:courtyard in:chapel in:cellar on:island near:fountain
        in:monastery near:tower near:cliff on:balcony in:attic in:vineyard near:waterfall
        in:cathedral""",
    "male_names": "Martin Andrew Joseph Patrick Oscar Leonard Matthew Nicholas Gilbert Harold",
    "female_names": "Susan Caroline Rachel Louisa Matilda Edith Amelia Judith Bertha Rebecca",
    "strict": "destroy damage inspect conceal abandon snatch acquire retrieve ruin overlook",
    "transitive": """polish measure scratch bury drag/dragged tear/tore/torn sketch decorate
        unwrap/unwrapped purchase""",
    "people_verbs": """scold insult accompany congratulate envy flatter arrest embrace accuse betray
        mock reward""",
    "reflexive": "flatter mock accuse scold congratulate injure disguise betray reward",
    "intransitive": """snore sob/sobbed yawn stumble crawl limp shudder hesitate loiter doze sneeze
        swoon""",
    "activities": "shout whisper chatter gallop",
    "irregular": """ride/rode/ridden=a_grey_pony|a_camel_across_the_desert
        wear/wore/worn=a_silk_gown|a_velvet_collar|a_crown
        tear/tore/torn=the_purple_curtain|the_contract
        shake/shook/shaken=the_heavy_branch|the_blanket
        swear/swore/sworn=a_solemn_oath|a_terrible_revenge
        blow/blew/blown=a_trumpet|the_horn
        weave/wove/woven=a_woollen_rug|a_tapestry
        swim/swam/swum/swimming=across_the_stream|towards_the_island
        forgive/forgave/forgiven=every_insult|the_pirate
        undertake/undertook/undertaken=a_perilous_voyage|an_expedition
        foresee/foresaw/foreseen=the_disaster|the_defeat
        overthrow/overthrew/overthrown=the_tyrant|the_emperor""",
    "short": "merry stern humble meek jolly plump pale rude lively fierce",
    "long": """timid elegant ignorant sensible reckless grateful eloquent arrogant industrious
        selfish charming""",
    "of_things": "rusty dusty ancient shiny crooked precious grey purple faded ragged valuable",
    "mass": """butter flour sugar coal soup honey furniture luggage cotton straw vinegar cheese
        milk wheat gravy""",
}


@dataclass(frozen=True, slots=True)
class Noun:
    """A countable noun; the preposition is that of a place ("in" the garden), else empty."""

    singular: str
    plural: str
    preposition: str = ""

    def form(self, plural: bool) -> str:
        return self.plural if plural else self.singular


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb's five forms, and for some of them phrases that can follow it."""

    base: str
    third: str
    past: str
    participle: str
    gerund: str
    tails: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lexicon:
    """One of the two tables, read. Each of `short` is an adjective with its comparative."""

    men: tuple[Noun, ...]
    women: tuple[Noun, ...]
    people: tuple[Noun, ...]
    things: tuple[Noun, ...]
    places: tuple[Noun, ...]
    male_names: tuple[str, ...]
    female_names: tuple[str, ...]
    strict: tuple[Verb, ...]
    transitive: tuple[Verb, ...]
    people_verbs: tuple[Verb, ...]
    reflexive: tuple[Verb, ...]
    intransitive: tuple[Verb, ...]
    activities: tuple[Verb, ...]
    irregular: tuple[Verb, ...]
    short: tuple[tuple[str, str], ...]
    long: tuple[str, ...]
    of_things: tuple[str, ...]
    mass: tuple[str, ...]


@functools.cache
def known() -> Lexicon:
    """The words of the training split and of in-domain rows."""
    return _read(KNOWN)


@functools.cache
def held_out() -> Lexicon:
    """The words of out-of-domain rows."""
    return _read(HELD_OUT)


def _read(table: Mapping[str, str]) -> Lexicon:
    def nouns(key: str) -> tuple[Noun, ...]:
        return tuple(_noun(entry) for entry in table[key].split())

    def verbs(key: str) -> tuple[Verb, ...]:
        return tuple(_verb(entry) for entry in table[key].split())

    def words(key: str) -> tuple[str, ...]:
        return tuple(table[key].split())

    return Lexicon(
        men=nouns("men"),
        women=nouns("women"),
        people=nouns("people"),
        things=nouns("things"),
        places=nouns("places"),
        male_names=words("male_names"),
        female_names=words("female_names"),
        strict=verbs("strict"),
        transitive=verbs("transitive"),
        people_verbs=verbs("people_verbs"),
        reflexive=verbs("reflexive"),
        intransitive=verbs("intransitive"),
        activities=verbs("activities"),
        irregular=verbs("irregular"),
        short=tuple(_compared(entry) for entry in table["short"].split()),
        long=words("long"),
        of_things=words("of_things"),
        mass=words("mass"),
    )


def _noun(entry: str) -> Noun:
    preposition, _, forms = entry.rpartition(":")
    singular, _, plural = forms.partition("/")
    return Noun(singular, plural or _with_s(singular), preposition)


def _verb(entry: str) -> Verb:
    forms, _, tails = entry.partition("=")
    base, *others = forms.split("/")
    stem = base[:-1] if base.endswith("e") and not base.endswith("ee") else base
    regular = (_with_s(base)[:-2] if _ends_in_y(base) else stem) + "ed"
    past = others[0] if others else regular
    participle = others[1] if len(others) > 1 else past
    doubled = past == stem + stem[-1] + "ed"  # "dropped", hence "dropping"
    gerund = others[2] if len(others) > 2 else (past[:-2] if doubled else stem) + "ing"
    follow = tuple(tail.replace("_", " ") for tail in tails.split("|")) if tails else ()
    return Verb(base, _with_s(base), past, participle, gerund, follow)


def _compared(entry: str) -> tuple[str, str]:
    adjective, _, comparative = entry.partition("/")
    stem = adjective[:-1] + "i" if _ends_in_y(adjective) else adjective.removesuffix("e")
    return adjective, comparative or stem + "er"


def _ends_in_y(word: str) -> bool:
    return word.endswith("y") and word[-2] not in "aeiou"


def _with_s(word: str) -> str:
    if _ends_in_y(word):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")
