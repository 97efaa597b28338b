"""What a map takes beyond the images alone: memory and time at larger sizes, and along many steps."""
