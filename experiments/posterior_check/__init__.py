"""Is the head's predictive variance that of refitting the head on resampled training images?"""
