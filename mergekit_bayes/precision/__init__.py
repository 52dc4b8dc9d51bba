"""Where precisions come from.

registry      the estimators by name and what each needs
targets       what is estimated: parameters, or linear layers
estimator     what every estimator offers
fisher        the diagonal Fisher information, from per-example gradients and labels drawn from the model
"""
