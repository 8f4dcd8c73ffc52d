"""Images and labels of a site: manifests, readers, transforms."""
