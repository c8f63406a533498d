"""The paper's figure: picture, encoder, bridge, projection, language model; prompt and text."""
