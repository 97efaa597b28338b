"""Maps of the zoo's text and few-step models, through their decoders, against whole trajectories with other weights."""
