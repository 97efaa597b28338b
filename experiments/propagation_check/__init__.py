"""Do tangents give the variance that whole trajectories with other weights have?"""
