"""Train the zoo model ``fashion-ddpm``: a class-conditional DDPM on Fashion-MNIST."""
