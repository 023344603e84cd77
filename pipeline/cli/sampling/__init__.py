"""Commands that sample images, or carry images to noise and back."""
