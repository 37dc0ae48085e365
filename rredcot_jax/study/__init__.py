"""Whether credit is right: ground truth, estimators, agreement and the page."""
