"""What a map of uncertainty is good for, each use beside controls that know nothing of weights."""
