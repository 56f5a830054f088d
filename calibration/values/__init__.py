"""What a tensor's values are like: ranges and what integers represent of them, histograms, a picture for a person."""
