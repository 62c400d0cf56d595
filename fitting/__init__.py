"""From a site's images to statistics, threshold and package, and the evaluation of a package. No torch here."""
