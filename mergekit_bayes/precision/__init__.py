"""mergekit_bayes.precision"""
