"""The border with diffusers: pipelines loaded, prompts encoded, images generated, the same way everywhere."""
