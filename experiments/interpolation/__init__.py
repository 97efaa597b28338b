"""How does uncertainty change on the way from one noise to another?"""
