"""Pure tensor maths of sparse autoencoders: coders, statistics, logits, steering, losses. No files, no models."""
