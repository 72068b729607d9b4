"""What we use of a library beyond its public interface: one module for each library, and a contract test for each."""
