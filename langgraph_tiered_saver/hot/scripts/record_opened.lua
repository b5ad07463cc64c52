-- Record in the metadata that the generation which Redis is in is open, unless it is in another one, or was emptied.
-- KEYS: metadata
-- ARGV: generation
-- Returns 1 if that is so.
if redis.call('HGET', KEYS[1], 'generation') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'opened', ARGV[1])
return 1
