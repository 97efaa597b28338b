"""Is what Tweedie's identity says the data leave open the spread of clean samples from the same noisy one?"""
