"""Records to tables, pictures, pages and progress. Measures nothing."""
