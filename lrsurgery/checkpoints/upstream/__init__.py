"""What is asked of other libraries beyond their public interface: one file for each of them."""
