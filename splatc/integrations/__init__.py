"""splatc inside other people's models. Each package here needs the library that it is named after."""
