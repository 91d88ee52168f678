"""What tables, pages, pictures and the model index say of methods and hosts, each in one place."""
