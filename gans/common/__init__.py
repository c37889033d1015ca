"""What every part uses: files that appear whole, random numbers of images, processes."""
