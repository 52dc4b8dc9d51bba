"""mergekit_bayes.merge"""
