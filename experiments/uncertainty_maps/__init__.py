"""Three variances side by side, along the steps and at the end, and the law of total variance as numbers that add up."""
