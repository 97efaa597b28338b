"""How many weight draws do tangents need, and which?"""
