"""Images and their latents."""
