"""Models: configurations of two towers in OpenCLIP's registry, and the folders of local towers."""
