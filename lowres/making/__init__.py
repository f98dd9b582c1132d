"""What a run and the rehearsal of its plan make alike: rows, model, choices, gradients."""
