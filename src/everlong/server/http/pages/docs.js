// Swagger UI on the description of this service; nothing is sent anywhere else.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
