"""From a scene of any size to its map: windows, blending, GeoTIFF in and out."""
