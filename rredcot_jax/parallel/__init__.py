"""Device meshes and several processes as one program."""
