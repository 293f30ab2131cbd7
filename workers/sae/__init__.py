"""Pure tensor maths of sparse autoencoders: coders, top-k, statistics, logits, steering, losses. No files, no models."""
