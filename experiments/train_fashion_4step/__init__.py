"""Train the zoo model ``fashion-4step``: ``fashion-ddpm`` distilled to four DDIM steps."""
