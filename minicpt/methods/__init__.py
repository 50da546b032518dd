"""Every method behind one `fit(split) -> Predictor`."""
