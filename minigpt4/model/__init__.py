"""The figure of the paper: picture, encoder, bridge, projection, language model, prompt."""
