"""Are held-out residuals where the noise models and the weights say?"""
