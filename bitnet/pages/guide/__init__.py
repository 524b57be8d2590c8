"""The figures of M. Grootendorst's "A Visual Guide to Quantization", computed: from the guide's own vectors, and beside
them from a layer of any model."""
