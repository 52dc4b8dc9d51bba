"""mergekit_bayes.posterior"""
