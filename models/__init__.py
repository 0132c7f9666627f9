"""What is computed: tables or arrays in, tables or arrays out. Knows nothing of Ray and Dask."""
