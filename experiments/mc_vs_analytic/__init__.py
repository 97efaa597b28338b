"""When is Monte Carlo needed for a head's predictive distribution?"""
