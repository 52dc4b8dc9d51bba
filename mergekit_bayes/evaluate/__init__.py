"""What a posterior predicts: samples of it, averaged probabilities, pruning by signal to noise."""
