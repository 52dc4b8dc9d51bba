"""mergekit_bayes.recipe"""
