-- Read the hot checkpoint of a namespace, if it is the one of an id.
-- KEYS: hot hash, shard, journal
-- ARGV: generation, checkpoint id
-- Returns {fields and values or false, journal length}.
local generation = redis.call('HGET', KEYS[2], 'g')
if generation ~= ARGV[1] then
  return redis.error_reply('TIEREDGENERATION the generation here is ' .. (generation or 'unknown'))
end
local fields = false
if redis.call('HGET', KEYS[1], 'id') == ARGV[2] then fields = redis.call('HGETALL', KEYS[1]) end
return {fields, redis.call('XLEN', KEYS[3])}
