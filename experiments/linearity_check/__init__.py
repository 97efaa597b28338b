"""How linear is a sampling trajectory in the weights?"""
