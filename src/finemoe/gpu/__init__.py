"""Everything that only a GPU needs: streams, device slots, copies from host memory."""
