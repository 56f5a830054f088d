"""The order of things: recipe, stages, flow and command line. Imports the other packages; nobody imports it."""
