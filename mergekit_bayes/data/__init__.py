"""From files or hub data sets to rows of tokens with labels: what training, precision passes and evaluation read."""
