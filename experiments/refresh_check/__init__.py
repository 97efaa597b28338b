"""Where and how often must the denoiser's response be measured?"""
