"""mergekit_bayes.checkpoint"""
