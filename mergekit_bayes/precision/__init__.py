"""Where precisions come from.

What estimators offer, and what is asked of them:

registry      the estimators by name and what each needs
targets       what is estimated: parameters, or linear layers
estimator     what every estimator from data offers: sums over rows, passes, a result

The estimators:

diagonal      fisher, empirical_fisher, ggn: squared gradients of examples
gram          second moments of the inputs of linear layers
kfac          these and those of output gradients, with corrected eigenvalues where wanted
adam          squared gradients of batches that an optimizer averaged

What they are made of:

chunks        rows of a batch, a few at a time
signals       what is sent backwards through the model: labels drawn from it, of the data, or random vectors
observe       one pass forwards and backwards, and what layers saw of it
gradients     the gradient of every row, from what the layers saw
coverage      parameters of which layers do not see all
squares       sums of squared gradients
moments       sums of outer products

What is asked of a result:

scale         the same curvature for another number of units
convergence   how much an estimate still moves
rank          whether there was enough data for the factors
"""
