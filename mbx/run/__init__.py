"""A conversion as a job: planned, carried out, journalled and committed."""
